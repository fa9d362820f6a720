"""One file per verb: a plan from headers alone, and the plan carried out."""
