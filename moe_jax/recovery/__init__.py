"""What a group of ranks needs when one of them fails.

``barrier`` is a value that nobody gets before all have come; ``window`` is the receive memory that is kept between
steps, how it is reset, and the tests of who still hears whom.
"""
