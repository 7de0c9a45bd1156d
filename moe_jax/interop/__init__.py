"""Bridges to other libraries. Each is a module of its own, which needs that library and is imported by name."""
