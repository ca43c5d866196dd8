"""Runs in keeper, template, store and every worker; never imports ray."""
