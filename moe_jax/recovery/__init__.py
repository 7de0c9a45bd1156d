"""What a group of ranks needs when one of them fails.

``barrier`` makes a value that no rank gets before all ranks have come. ``window`` has the receive memory that is kept
between steps, how it is reset, and the tests of who still hears whom.
"""
