"""What a conversion will cost, from its recipe alone: no weights, no GPU."""
