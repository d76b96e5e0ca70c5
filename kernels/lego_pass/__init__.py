"""What a LegoBlock does between two attentions, without a transform (MM-Lego, Eq. 2 and 3)."""
