"""Which implementations serve a model, and why not the others. Imports no model: it is given the modules it reads."""
