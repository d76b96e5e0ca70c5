"""Values of the one token that a row has: what attention takes of it, whatever Q and K are."""
