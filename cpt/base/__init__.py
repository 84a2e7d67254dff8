"""What every part may use: errors, units, registries, files, events. Imports nothing of the project."""
