"""`fvgen plan`: what will training need?"""
