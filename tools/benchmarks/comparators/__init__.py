"""What people run today, written plainly: the other side of each comparison."""
