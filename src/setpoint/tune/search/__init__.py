"""The tuner: screen, race, refine, certify, and write a recipe with its evidence."""
