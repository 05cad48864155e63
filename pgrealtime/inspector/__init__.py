"""What an operator may look at on the admin port: answers are made when they are asked for."""
