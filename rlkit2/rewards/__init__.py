"""Tabular MDPs, canonical reward forms and the distances between rewards."""
