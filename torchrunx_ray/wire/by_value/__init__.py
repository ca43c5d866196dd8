"""Classes and functions of the script, by value: the parts that cloudpickle would lose."""
