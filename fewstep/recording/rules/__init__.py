"""The rules of a recipe, fitted by value: where the sample and the time go, and where a network's answer comes from."""
