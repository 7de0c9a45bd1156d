"""The layer, in the order of the data: router, placement, dispatch, experts, combine, and the rounds around them."""
