"""Checks of the machine and the installation, one function a check, before anything fails for want of them."""
