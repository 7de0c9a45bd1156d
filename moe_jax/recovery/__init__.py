"""What a group of ranks needs when one of them fails: the barrier, the receive window, the tests of links."""
