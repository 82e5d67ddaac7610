"""A second network in the step, as a control network is: found, fed and switched as the pipeline does."""
