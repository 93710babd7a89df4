"""Studies of the estimator: what it promises and what it delivers."""
