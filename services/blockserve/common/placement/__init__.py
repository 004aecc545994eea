"""What operators wish about placement: kept in the zoo, served to those who may change it."""
