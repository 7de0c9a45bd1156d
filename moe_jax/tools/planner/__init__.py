"""What a machine would make of a configuration: `python -m moe_jax plan` and `python -m moe_jax sweep`.

``question`` is what is asked, ``meshes`` which meshes there are for so many devices, ``figures`` what is predicted.
``compiled`` asks a compiler and ``here`` a clock. ``screen`` is `plan`, and ``sweep`` is `sweep`, with its ``rows`` and
its ``picture``; ``words`` are numbers as a person reads them.
"""
