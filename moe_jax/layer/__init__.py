"""The layer, in the order of the data.

``router`` chooses experts, ``placement`` maps them to their instances, ``dispatch`` sends rows, ``grouping`` and
``experts`` multiply them expert by expert, and ``combine`` brings them back, and adds what ``weightless`` experts make
of a token. ``rounds`` repeats that as often as a skew needs, and ``one_device`` does what is left of it where nothing
is exchanged. ``layer`` is all of it on one shard, ``on_mesh`` over global arrays, and ``params`` says what parameters
it has.
"""
