"""Scheme menus and job presets, as YAML that ships with the package."""
