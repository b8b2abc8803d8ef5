"""One script per revision; none is changed once it has been released."""
