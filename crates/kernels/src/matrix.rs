//! Strided matrices in host memory.

/// A strided matrix of `f32` that is read through a pointer.
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

    /// The submatrix that begins at an element.
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

/// A matrix that several threads read.
pub(crate) struct Read(pub(crate) Matrix);

// SAFETY: nothing writes through a `Matrix`.
unsafe impl Sync for Read {}
