"""Prior work: gradient matching (DLG, iDLG, Inverting Gradients, TabLeak), the closed form. Notebook 07_prior_work."""
