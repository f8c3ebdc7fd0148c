"""How a Segment Anything learns from accepted masks, and what of it is kept."""
