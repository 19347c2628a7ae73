//! A vector in pieces: it grows without moving what is there, so for no moment is there twice as much of it.

/// Items of a piece.
const PIECE: usize = 4096;

/// The vector.
pub(crate) struct Segments<T> {
    /// All full but the last, which is not empty.
    pieces: Vec<Vec<T>>,
}

impl<T> Default for Segments<T> {
    fn default() -> Self {
        Self { pieces: Vec::new() }
    }
}

impl<T> Segments<T> {
    pub(crate) fn len(&self) -> usize {
        self.pieces.last().map_or(0, |last| (self.pieces.len() - 1) * PIECE + last.len())
    }

    pub(crate) fn get(&self, i: usize) -> Option<&T> {
        self.pieces.get(i / PIECE)?.get(i % PIECE)
    }

    pub(crate) fn get_mut(&mut self, i: usize) -> Option<&mut T> {
        self.pieces.get_mut(i / PIECE)?.get_mut(i % PIECE)
    }

    pub(crate) fn push(&mut self, item: T) {
        match self.pieces.last_mut() {
            Some(last) if last.len() < PIECE => last.push(item),
            _ => {
                // What is not used of it yet is address space only.
                let mut piece = Vec::with_capacity(PIECE);
                piece.push(item);
                self.pieces.push(piece);
            }
        }
    }

    /// Takes the last item away and puts it in the place of item `i`.
    pub(crate) fn swap_remove(&mut self, i: usize) {
        let Some(last) = self.pieces.last_mut() else { return };
        let Some(item) = last.pop() else { return };
        if last.is_empty() {
            self.pieces.pop();
        }
        if let Some(gap) = self.get_mut(i) {
            *gap = item;
        }
    }

    pub(crate) fn iter(&self) -> impl Iterator<Item = &T> {
        self.pieces.iter().flatten()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn behaves_like_a_vector() {
        let (mut pieces, mut model) = (Segments::default(), Vec::new());
        for i in 0..3 * PIECE + 7 {
            pieces.push(i);
            model.push(i);
        }
        for step in 0.. {
            assert_eq!(pieces.len(), model.len());
            if step % 1000 == 0 || model.len() < 10 {
                assert!(pieces.iter().eq(&model));
            }
            if model.is_empty() {
                break;
            }
            let i = step * 7919 % model.len();
            assert_eq!(pieces.get(i), model.get(i));
            pieces.swap_remove(i);
            model.swap_remove(i);
        }
        pieces.swap_remove(0);
        assert_eq!(pieces.get(0), None);
    }
}
