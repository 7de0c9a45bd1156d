"""What a compiled program contains, read off the text of its optimised HLO.

``text`` reads instructions and their places in loops, ``cost`` what they multiply and move, ``contract`` what a program
has of collectives, scatters and memory, and whether it keeps to rules about them.
"""
