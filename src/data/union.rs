//! Sets that are joined step by step.

/// A forest over `0..count`; the root of a set is its smallest member, in whatever order it was joined.
pub struct Union {
    parent: Vec<u32>,
}

impl Union {
    pub fn new(count: usize) -> Self {
        Self {
            parent: (0..count as u32).collect(),
        }
    }

    pub fn root(&mut self, member: usize) -> usize {
        let mut node = member as u32;
        while self.parent[node as usize] != node {
            self.parent[node as usize] = self.parent[self.parent[node as usize] as usize];
            node = self.parent[node as usize];
        }
        node as usize
    }

    /// Whether the two were apart.
    pub fn join(&mut self, first: usize, second: usize) -> bool {
        let (first, second) = (self.root(first), self.root(second));
        self.parent[first.max(second)] = first.min(second) as u32;
        first != second
    }

    /// The root of every member.
    pub fn roots(&mut self) -> Vec<u32> {
        (0..self.parent.len())
            .map(|member| self.root(member) as u32)
            .collect()
    }
}
