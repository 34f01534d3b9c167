"""What each compression would cost and save here, measured on a state's own bytes."""
