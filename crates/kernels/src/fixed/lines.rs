//! Buffers that begin where a cache line does.

use std::ops::{Deref, DerefMut, Range};

use crate::memory::{Zero, zeroed};

/// `n` zeros from the beginning of a cache line on: a vector that lies across two takes two reads.
#[derive(Default)]
pub(crate) struct Lines<T> {
    buffer: Vec<T>,
    values: Range<usize>,
}

impl<T: Zero> Lines<T> {
    const BYTES: usize = 64;

    pub(crate) fn zeroed(n: usize) -> Self {
        let buffer = zeroed::<T>(n + Self::BYTES / size_of::<T>());
        let first = buffer.as_ptr().align_offset(Self::BYTES);
        Self {
            buffer,
            values: first..first + n,
        }
    }
}

impl<T> Deref for Lines<T> {
    type Target = [T];

    fn deref(&self) -> &[T] {
        &self.buffer[self.values.clone()]
    }
}

impl<T> DerefMut for Lines<T> {
    fn deref_mut(&mut self) -> &mut [T] {
        &mut self.buffer[self.values.clone()]
    }
}
