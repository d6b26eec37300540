"""The one place where a mean or a variance is computed: functions over tensors, no nn.Module."""
