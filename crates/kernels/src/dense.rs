//! Products of dense matrices on the host, each on the thread that asks for it.

use gemm::Parallelism;

/// A result whose parts are written by several tasks.
pub(crate) struct Shared(*mut f32);

// SAFETY: the tasks write disjoint parts, as the comments where they do so say.
unsafe impl Sync for Shared {}

impl Shared {
    pub(crate) fn new(values: &mut [f32]) -> Self {
        Self(values.as_mut_ptr())
    }

    /// # Safety
    /// `n` lies within the result.
    pub(crate) unsafe fn offset(&self, n: usize) -> *mut f32 {
        // SAFETY: the caller's promise.
        unsafe { self.0.add(n) }
    }
}

/// A strided matrix that is read.
#[derive(Clone, Copy)]
pub(crate) struct Matrix {
    pub(crate) data: *const f32,
    pub(crate) row_stride: isize,
    pub(crate) column_stride: isize,
}

impl Matrix {
    pub(crate) fn new(data: *const f32, row_stride: usize, column_stride: usize) -> Self {
        Self {
            data,
            row_stride: row_stride as isize,
            column_stride: column_stride as isize,
        }
    }

    /// The matrix from an element on.
    pub(crate) fn at(self, row: usize, column: usize) -> Self {
        let at = row as isize * self.row_stride + column as isize * self.column_stride;
        Self {
            data: self.data.wrapping_offset(at),
            ..self
        }
    }

    pub(crate) fn transpose(self) -> Self {
        Self {
            data: self.data,
            row_stride: self.column_stride,
            column_stride: self.row_stride,
        }
    }
}

/// `c = a · b`, or `c += a · b` if `add`, with `a [m, k]`, `b [k, n]` and `c [m, n]` in rows of
/// `c_stride`; on the calling thread.
///
/// # Safety
/// The three lie within their allocations, and nobody else writes `c`.
pub(crate) unsafe fn multiply_add(
    [m, k, n]: [usize; 3],
    a: Matrix,
    b: Matrix,
    c: *mut f32,
    c_stride: usize,
    add: bool,
) {
    // SAFETY: the caller's promise.
    unsafe {
        gemm::gemm(
            m,
            n,
            k,
            c,
            1,
            c_stride as isize,
            add,
            a.data,
            a.column_stride,
            a.row_stride,
            b.data,
            b.column_stride,
            b.row_stride,
            1.0,
            1.0,
            false,
            false,
            false,
            Parallelism::None,
        );
    }
}
