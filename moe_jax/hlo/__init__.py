"""What a compiled program contains, read off the text of its optimised HLO: instructions, costs, contracts."""
