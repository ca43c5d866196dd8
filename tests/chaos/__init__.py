"""A training under random kills, which must end as if nothing had happened."""
