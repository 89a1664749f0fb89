"""One trajectory in every layout."""
