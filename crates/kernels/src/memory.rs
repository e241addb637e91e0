//! Large buffers.

/// The size in bytes from which buffers are requested in huge pages: in pages of 4 KiB, the first
/// writes to a buffer take longer than the computation of its values.
#[cfg(target_os = "linux")]
const HUGE: usize = 4 << 20;

/// A buffer of `n` zeros.
pub(crate) fn zeroed<T: Zero>(n: usize) -> Vec<T> {
    let buffer = vec![T::ZERO; n];
    #[cfg(target_os = "linux")]
    if size_of_val(buffer.as_slice()) >= HUGE {
        const PAGE: usize = 2 << 20;
        let range = buffer.as_ptr_range();
        let start = (range.start as usize).next_multiple_of(PAGE);
        let end = range.end as usize / PAGE * PAGE;
        // SAFETY: the pages lie within the buffer. The advice changes the mapping of the pages, not
        // their contents, and has no effect if it is refused.
        unsafe {
            libc::madvise(start as *mut libc::c_void, end - start, libc::MADV_HUGEPAGE);
        }
    }
    buffer
}

/// A number whose zero has only zero bits, so that fresh memory of the system needs no clearing.
pub(crate) trait Zero: Copy {
    const ZERO: Self;
}

impl Zero for f32 {
    const ZERO: Self = 0.0;
}

impl Zero for u32 {
    const ZERO: Self = 0;
}

impl Zero for u8 {
    const ZERO: Self = 0;
}

impl Zero for i8 {
    const ZERO: Self = 0;
}
