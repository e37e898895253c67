"""Recipes, sample data, and the scripts that make and measure them."""
