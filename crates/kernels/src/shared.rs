//! Results whose parts are written by several tasks.

/// A slice that several tasks write, each in parts of its own.
pub(crate) struct Shared<T = f32>(*mut T);

// SAFETY: only the unsafe methods reach the values, and their callers keep the parts disjoint.
unsafe impl<T: Send> Sync for Shared<T> {}

impl<T> Shared<T> {
    pub(crate) fn new(values: &mut [T]) -> Self {
        Self(values.as_mut_ptr())
    }

    /// The address of element `at`.
    ///
    /// # Safety
    /// `at` does not exceed the length of the slice, which is still borrowed.
    #[cfg(feature = "flex")]
    pub(crate) unsafe fn offset(&self, at: usize) -> *mut T {
        // SAFETY: the caller's promise.
        unsafe { self.0.add(at) }
    }

    /// The `n` elements from element `at` on.
    ///
    /// # Safety
    /// The elements lie within the slice, which is still borrowed, and nothing else uses them while
    /// the result lives.
    #[expect(clippy::mut_from_ref, reason = "the caller alone uses the elements")]
    #[inline(always)]
    pub(crate) unsafe fn slice(&self, at: usize, n: usize) -> &mut [T] {
        // SAFETY: the caller's promise.
        unsafe { std::slice::from_raw_parts_mut(self.0.add(at), n) }
    }
}
