"""Why a recipe is what it is: counterfactuals, what binds, what was rejected."""
