"""Errors, files, devices, processes, downloads and reports: knows nothing of the method."""
