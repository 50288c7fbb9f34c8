//! Files as one ordered stream of records, parsed on rayon's threads: while one lot of blocks is parsed, the next is read.

use std::collections::VecDeque;

use rayon::prelude::*;

use super::record::Item;
use crate::error::{Error, Result};

/// Bytes of a file that are parsed as one piece of work; a longer record is a block of its own.
pub(super) const BLOCK_BYTES: usize = 1 << 20;
/// Blocks that are read ahead, for each thread.
const BLOCKS_PER_THREAD: usize = 2;

/// Part of a file.
pub(super) enum Block {
    /// Gives its items, on any thread.
    Parse(Box<dyn FnOnce() -> Vec<Result<Item>> + Send>),
    /// What is wrong with the file as a whole, asked once every block before it has been parsed.
    End(Box<dyn FnOnce() -> Option<Error> + Send>),
}

/// A format's reader: cuts a file into blocks, in order. Nothing is to be read after an error.
pub(super) trait Blocks: Send {
    fn next_block(&mut self) -> Result<Option<Block>>;
}

/// The files to be read, each opened when its turn comes.
pub(super) type Sources = Box<dyn Iterator<Item = Result<Box<dyn Blocks>>> + Send>;

/// What a [`Stream`] yields.
pub(super) enum Found {
    Item(Item),
    /// The file has been read and gave nothing.
    Empty,
}

enum Raw {
    Block(Block),
    Failed(Error),
    Over,
}

enum Ready {
    Items(std::vec::IntoIter<Result<Item>>),
    End(Box<dyn FnOnce() -> Option<Error> + Send>),
    Failed(Error),
    Over,
}

/// Items with the index of their file, in the order of the files; ends after an error.
pub(super) struct Stream {
    sources: Sources,
    current: Option<Box<dyn Blocks>>,
    /// Index of the file that `current` reads, or of the next one.
    file: usize,
    /// Read and not yet parsed.
    raw: Vec<(usize, Raw)>,
    ready: VecDeque<(usize, Ready)>,
    /// Whether the file at the front of `ready` has given anything.
    any: bool,
    /// Nothing more is to be read.
    over: bool,
}

impl Stream {
    pub fn new(sources: Sources) -> Self {
        Self {
            sources,
            current: None,
            file: 0,
            raw: Vec::new(),
            ready: VecDeque::new(),
            any: false,
            over: false,
        }
    }

    /// Parses what was read and reads on meanwhile; false at the end of all files.
    fn refill(&mut self) -> bool {
        let count = rayon::current_num_threads() * BLOCKS_PER_THREAD;
        if self.raw.is_empty() {
            self.raw = self.gather(count);
        }
        let raw = std::mem::take(&mut self.raw);
        if raw.is_empty() {
            return false;
        }
        let (next, ready) = rayon::join(
            || self.gather(count),
            || {
                raw.into_par_iter()
                    .map(|(file, raw)| (file, parse(raw)))
                    .collect::<Vec<_>>()
            },
        );
        self.raw = next;
        self.ready.extend(ready);
        true
    }

    fn gather(&mut self, count: usize) -> Vec<(usize, Raw)> {
        let mut raw = Vec::new();
        while !self.over && raw.len() < count {
            let file = self.file;
            let found = match self.read() {
                Ok(Some(found)) => found,
                Ok(None) => break,
                Err(error) => {
                    self.over = true;
                    Raw::Failed(error)
                }
            };
            raw.push((file, found));
        }
        raw
    }

    fn read(&mut self) -> Result<Option<Raw>> {
        if self.current.is_none() {
            self.current = self.sources.next().transpose()?;
        }
        let Some(source) = &mut self.current else {
            self.over = true;
            return Ok(None);
        };
        if let Some(block) = source.next_block()? {
            return Ok(Some(Raw::Block(block)));
        }
        self.current = None;
        self.file += 1;
        Ok(Some(Raw::Over))
    }

    fn fail(&mut self, error: Error) -> Result<(usize, Found)> {
        self.over = true;
        self.current = None;
        self.raw.clear();
        self.ready.clear();
        Err(error)
    }
}

fn parse(raw: Raw) -> Ready {
    match raw {
        Raw::Block(Block::Parse(parse)) => Ready::Items(parse().into_iter()),
        Raw::Block(Block::End(end)) => Ready::End(end),
        Raw::Failed(error) => Ready::Failed(error),
        Raw::Over => Ready::Over,
    }
}

impl Iterator for Stream {
    type Item = Result<(usize, Found)>;

    fn next(&mut self) -> Option<Self::Item> {
        loop {
            let Some((file, front)) = self.ready.front_mut() else {
                if self.refill() {
                    continue;
                }
                return None;
            };
            let file = *file;
            if let Ready::Items(items) = front
                && let Some(item) = items.next()
            {
                self.any = true;
                return match item {
                    Ok(item) => Some(Ok((file, Found::Item(item)))),
                    Err(error) => Some(self.fail(error)),
                };
            }
            match self.ready.pop_front() {
                Some((_, Ready::Failed(error))) => return Some(self.fail(error)),
                Some((_, Ready::End(end))) => {
                    if let Some(error) = end() {
                        return Some(self.fail(error));
                    }
                }
                Some((_, Ready::Over)) if !std::mem::take(&mut self.any) => {
                    return Some(Ok((file, Found::Empty)));
                }
                _ => {}
            }
        }
    }
}
