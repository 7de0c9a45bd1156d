"""What a machine would make of a configuration: `python -m moe_jax plan` and `python -m moe_jax sweep`.

``question`` is what is asked, ``meshes`` which meshes there are for so many devices, ``figures`` what is predicted.
``compiled`` asks a compiler for figures, and ``here`` takes times on the devices that are here. ``screen`` is the
command `plan`, with ``plan_picture``; ``sweep`` is the command `sweep`, with its ``rows`` and its ``picture``.
``words`` writes numbers as a person reads them.
"""
