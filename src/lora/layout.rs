//! Where a group's trained tensors lie in its flat parameter vector.

use super::{Base, Group, Scaled};

/// A trained tensor inside the group's flat parameter vector.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Tensor {
    pub name: String,
    pub offset: usize,
    pub shape: Vec<usize>,
}

impl Group {
    /// The trained tensors in the order they lie in `theta`.
    pub fn tensors(&self) -> Vec<Tensor> {
        let mut tensors = Vec::new();
        let mut offset = 0;
        let mut push = |name: String, shape: Vec<usize>| {
            let len: usize = shape.iter().product();
            tensors.push(Tensor {
                name,
                offset,
                shape,
            });
            offset += len;
        };
        match &self.base {
            Base::Frozen { .. } => {
                for (member, adapter) in self.adapters() {
                    push(
                        format!("{}.lora_A.weight", member.name),
                        vec![adapter.r, self.k],
                    );
                }
                for (member, adapter) in self.adapters() {
                    push(
                        format!("{}.lora_B.weight", member.name),
                        vec![member.n, adapter.r],
                    );
                }
                for member in &self.members {
                    let shape = match member.scaled {
                        None => continue,
                        Some(Scaled::Output) => vec![member.n, 1],
                        Some(Scaled::Input) => vec![1, self.k],
                    };
                    push(format!("{}.ia3_l", member.name), shape);
                }
            }
            Base::Trained { biases } => {
                for member in &self.members {
                    push(format!("{}.weight", member.name), vec![member.n, self.k]);
                }
                for (member, _) in self.members.iter().zip(biases).filter(|(_, has)| **has) {
                    push(format!("{}.bias", member.name), vec![member.n]);
                }
            }
        }
        tensors
    }

    /// Length of `theta`.
    pub fn theta_len(&self) -> usize {
        self.tensors()
            .last()
            .map_or(0, |last| last.offset + last.shape.iter().product::<usize>())
    }

    pub(super) fn places(&self) -> Places {
        Places {
            r: 0,
            b: self.rank() * self.k,
        }
    }
}

/// Walks the members' places in H (columns) and in `theta` (B's elements).
pub(super) struct Places {
    r: usize,
    b: usize,
}

impl Places {
    pub fn next_b(&mut self, n: usize, r: usize) -> (usize, std::ops::Range<usize>) {
        let at = (self.r, self.b..self.b + n * r);
        self.r += r;
        self.b += n * r;
        at
    }
}
