"""Other people's programs: what they make is read here, and what is made here is read by them."""
