"""What every package needs: checks, conversion of users' arrays, process-wide state, files of tensors."""
