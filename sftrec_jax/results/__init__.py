"""Results that are published with the lists they come from: written, verified, run again, shown in the README."""
