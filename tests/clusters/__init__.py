"""The clusters that tests run on, beside the one of a single node that most of them share."""
