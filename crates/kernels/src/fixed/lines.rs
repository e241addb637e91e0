//! Buffers that are aligned to cache lines.

use std::ops::{Deref, DerefMut, Range};

use crate::memory::{Zero, zeroed};

/// A buffer aligned to a cache line: a vector that spans two lines takes two reads.
#[derive(Default)]
pub(crate) struct Lines<T> {
    buffer: Vec<T>,
    values: Range<usize>,
}

impl<T: Zero> Lines<T> {
    const BYTES: usize = 64;

    /// `n` zeros.
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
