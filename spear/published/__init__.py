"""SPEAR as published (Dimitrov, Baader, Müller, Vechev, NeurIPS 2024), in reading order beside its notebooks.

lowrank                  dL/dW = L R: rank = batch size                               02_low_rank
sparsity                 the ReLU mask is the zero pattern of dL/dZ                    03_relu_sparsity
kernels, walks           kernels of sampled row submatrices: textbook, and fast        04_sampling
theory                   expected work, failure probability                            01_theory
view                     the server's view of one layer                                02_low_rank
sampling                 rounds of proposals                                           04_sampling
filtering                false directions out                                          05_filtering
greedy                   the right b of them, scales, disaggregation, matching         05_filtering
algorithm                Algorithm 1: sample, filter, choose                           06_attack
certificate              evidence of one layer for the theorem of spear.certificate    05, 06_attack
one_layer                from view to batch, whatever finds the columns                06_attack
guided                   sampling where a prior points                                 07_prior_work
"""
